{{- define "metadist.labels" -}}
app.kubernetes.io/name: metadist
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "metadist.pod" -}}
{{- if .Values.image.pullSecrets }}
imagePullSecrets:
{{- range .Values.image.pullSecrets }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 1000
  fsGroup: 1000
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{- define "metadist.container" -}}
{{- $missing := "image.repository is missing: the image of deploy/Dockerfile in your registry" }}
image: {{ printf "%s:%s" (required $missing .Values.image.repository) .Values.image.tag | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
env:
  - name: OMP_NUM_THREADS
    value: "1"
{{- if .Values.data }}
  - name: METADIST_DATA
    value: {{ .Values.data | quote }}
{{- end }}
{{- if .Values.mlflow.trackingUri }}
  - name: MLFLOW_TRACKING_URI
    value: {{ .Values.mlflow.trackingUri | quote }}
{{- end }}
{{- if .Values.credentials.secretName }}
envFrom:
  - secretRef:
      name: {{ .Values.credentials.secretName | quote }}
{{- end }}
{{- end }}

{{- define "metadist.cluster" -}}
rayVersion: {{ .Values.rayVersion | quote }}
authOptions:
  mode: token
{{- if .Values.auth.secretName }}
  secretName: {{ .Values.auth.secretName | quote }}
{{- end }}
enableInTreeAutoscaling: {{ .Values.autoscaler.enabled }}
{{- if .Values.autoscaler.enabled }}
autoscalerOptions:
  version: v2
  upscalingMode: {{ .Values.autoscaler.upscalingMode }}
  idleTimeoutSeconds: {{ .Values.autoscaler.idleTimeoutSeconds }}
{{- end }}
headGroupSpec:
  rayStartParams:
    num-cpus: "0"
    dashboard-host: 0.0.0.0
  template:
    metadata:
      labels:
        {{- include "metadist.labels" . | nindent 8 }}
    spec:
      {{- include "metadist.pod" . | nindent 6 }}
      {{- if .Values.autoscaler.enabled }}
      restartPolicy: Never
      {{- end }}
      containers:
        - name: ray-head
          {{- include "metadist.container" . | nindent 10 }}
          ports:
            - {name: gcs, containerPort: 6379}
            - {name: dashboard, containerPort: 8265}
            - {name: serve, containerPort: 8000}
          resources:
            requests: {cpu: {{ .Values.head.cpu | quote }}, memory: {{ .Values.head.memory | quote }}}
            limits: {cpu: {{ .Values.head.cpu | quote }}, memory: {{ .Values.head.memory | quote }}}
          volumeMounts:
            - {name: scratch, mountPath: /tmp/ray}
            {{- if .Values.run.config }}
            - {name: config, mountPath: /etc/metadist, readOnly: true}
            {{- end }}
            {{- if .Values.service.enabled }}
            - {name: token, mountPath: /etc/metadist-service, readOnly: true}
            {{- end }}
      volumes:
        - name: scratch
          emptyDir: {}
        {{- if .Values.run.config }}
        - name: config
          configMap:
            name: {{ .Release.Name }}-config
        {{- end }}
        {{- if .Values.service.enabled }}
        - name: token
          secret:
            secretName: {{ required "service.tokenSecretName is missing" .Values.service.tokenSecretName | quote }}
        {{- end }}
      {{- if .Values.head.nodeSelector }}
      nodeSelector:
        {{- toYaml .Values.head.nodeSelector | nindent 8 }}
      {{- end }}
      {{- if .Values.head.tolerations }}
      tolerations:
        {{- toYaml .Values.head.tolerations | nindent 8 }}
      {{- end }}
workerGroupSpecs:
  {{- range .Values.workers }}
  - groupName: {{ .name | quote }}
    replicas: {{ .minReplicas }}
    minReplicas: {{ .minReplicas }}
    maxReplicas: {{ .maxReplicas }}
    rayStartParams: {}
    template:
      metadata:
        labels:
          {{- include "metadist.labels" $ | nindent 10 }}
      spec:
        {{- include "metadist.pod" $ | nindent 8 }}
        automountServiceAccountToken: false
        restartPolicy: Never
        containers:
          - name: ray-worker
            {{- include "metadist.container" $ | nindent 12 }}
            resources:
              requests:
                cpu: {{ .cpu | quote }}
                memory: {{ .memory | quote }}
              limits:
                cpu: {{ .cpu | quote }}
                memory: {{ .memory | quote }}
                {{- if .gpu }}
                nvidia.com/gpu: {{ .gpu | quote }}
                {{- end }}
            volumeMounts:
              - {name: scratch, mountPath: /tmp/ray}
              {{- if $.Values.service.enabled }}
              - {name: token, mountPath: /etc/metadist-service, readOnly: true}
              {{- end }}
        volumes:
          - name: scratch
            emptyDir: {}
          {{- if $.Values.service.enabled }}
          - name: token
            secret:
              secretName: {{ $.Values.service.tokenSecretName | quote }}
          {{- end }}
        {{- if .nodeSelector }}
        nodeSelector:
          {{- toYaml .nodeSelector | nindent 10 }}
        {{- end }}
        {{- if .tolerations }}
        tolerations:
          {{- toYaml .tolerations | nindent 10 }}
        {{- end }}
  {{- end }}
{{- end }}
